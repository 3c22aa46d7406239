"""Loss, optimizer, engine, loop, evaluation and what a run reports."""
