"""The report of a run: one offline HTML page, and a picture for the README."""
