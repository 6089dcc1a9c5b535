"""The engine: carries the runs of the catalog out, by stabilize.

    runner      the one process of a ROOT that does it: takes runs up, rings, lets go
    steps       whose turn it is, and what follows from its end
    turn        one step that begins, or goes on
    work        what a step does, by its operator
    outcomes    what a step came to, or is raised where its turn does not end it
    items       of loops that sleep, those that have not ended
    kit         what the steps of one process share
    plan        a definition as the engine walks it
    plans       those of the runs that are carried out, kept at hand
    verdicts    whether a step may begin, by what became of those before it
    scope       what the templates of a step see
    spots       one step of one run, and its names
    stages      a level of a plan as stabilize carries it
    attempts    calls with a limit of time, and when a step may be tried again
    shares      whose tools are called next, where there are more calls than places
    database    stabilize: what comes next, in ROOT/workflows/engine.db
    beating     its sign of life, and how many steps are at work

Which step comes next, and that it waits its turn, sleeps or is tried again later, is
stabilize's: each step is a stage there. What a step came to is in the catalog and nowhere
else (`workflows.runs`), so that database may be lost at any time: runs begin there anew, and
steps that are finished answer with their results.
"""
