"""A connector that moves nothing and answers with the parameters a request came with."""

from __future__ import annotations

from typing import Any

from kvferry.contract import KVConnectorBase_V1, KVConnectorMetadata


class EchoConnector(KVConnectorBase_V1):
    """Lets a test see kv_transfer_params go in and out."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return _Nothing()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any]]:
        return False, {"echo": request.kv_transfer_params, "salt": request.cache_salt}


class _Nothing(KVConnectorMetadata):
    pass
