"""Token stores: shards, reading, order, statistics and the LightningDataModule over them."""
