"""Built-in connectors, each a scheduler side and a worker side over `kvferry.contract.sides`."""
