"""Our own client of LMCache's multi-process server. Nothing here imports lmcache."""
