"""From a store to batches: order, cut, loaders, streams."""
