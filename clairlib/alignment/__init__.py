"""Floor 4: adapter folders judged and refined module by module, as `clair align` does; called by `clairlib.align`."""
