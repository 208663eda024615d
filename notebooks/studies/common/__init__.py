"""Code that several studies use: aggregation rules, verdicts, federations, intervals, tables and plots."""
