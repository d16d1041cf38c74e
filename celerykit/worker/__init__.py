"""
What runs in a worker's parent process: no message can kill it, and none is acknowledged before it ran or was buried.

::

    consumer   receives messages, and lets those start that may
    request    one message on its way through the pool, to its end
    ending     how a message can end, read off the exception
    shape      what is wrong with a message before anything is done with it
    starts     how often a message was started, and whether it may be once more
    burial     writes dead letters, until they are written
    claims     ends the claims of runs whose process is gone
    returns    gives messages back after a while
    leases     keeps this worker's messages its own, on Redis and Valkey
    shutdown   gives back what was not finished
    pulse      leaves signs of life
    serving    serves numbers over HTTP, from when `metrics_step` says so
"""
