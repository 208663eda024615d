"""Floor 4: alignment of adapter folders, module by module. It is behind `clair align` and `clairlib.align`."""
