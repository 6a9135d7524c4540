"""Where pictures come from: folders, tables and tars; how they are decoded and split."""
