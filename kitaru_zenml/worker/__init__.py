"""`kitaru worker`: continues runs whose process died, whose answer, event or time has come, or that somebody cancelled.

`needs` decides what a run needs, `agenda` knows which runs to look at, `children` are the processes that execute them, `worker` is the
loop. Nothing it does is stored but hints: a worker that dies at any point loses nothing, and any number of them may run.
"""
