"""
What the second promise rests on: real workers, real kills, and a ledger of what really happened.

Each test is one row of the table in ``docs/faults.md``. It lays out a `Scene`
(a broker, the shop, workers as the stock command line starts them), breaks
something, and asks the scene for its verdict: what was lost, stuck, done
twice, and what is among the dead letters.

    make faults                          all rows, then the table
    make faults ARGS="-k kills"          some of them
    python -m tests.faults.table         write docs/faults.md from the last run

A row that needs a person's judgement (a rerun may repeat an effect that was
there when its process died) says how many repeats it allows, and why.
"""
