"""What a run leaves and goes on from: files, shards, resumption, loading, export."""
