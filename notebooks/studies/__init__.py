"""What the notebooks compute and draw, a folder each; `common` is for all. clairlib never imports it."""
