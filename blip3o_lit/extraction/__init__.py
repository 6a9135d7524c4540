"""Images -> token shards: the engine, its workers and the demo's own store."""
