"""Training straight from pictures: read, decoded and encoded in front of the network."""
