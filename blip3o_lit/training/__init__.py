"""One run: the Trainer and its module, callbacks, loggers, what it writes and says."""
