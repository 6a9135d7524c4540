"""Token stores on disk and behind addresses: index, tars, shards, formats."""
