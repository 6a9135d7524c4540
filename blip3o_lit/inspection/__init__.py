"""What doctor checks: the machine, and token stores; repair of a store's index."""
