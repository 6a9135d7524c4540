"""All that knows the two projects before this one: their pickles, flags and command lines."""
