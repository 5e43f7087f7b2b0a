"""Tasks in child processes: a function of ours, called by name in a process of its own, with a time limit and a log."""
