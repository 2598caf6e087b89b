"""Questions asked of a run directory, each answered with a table, a figure and a sentence."""
