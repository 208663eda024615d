"""What several studies need, once: rules, verdicts, federations, intervals, tables, plots."""
