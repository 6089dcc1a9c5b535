"""What is left after a kill, a power cut, a failing disk or a flipped bit.

steps      disks that count, kill or fail at a durable step
victims    child processes; the list of what they acknowledged is kept by the parent
powercut   a disk that records its steps, and the states a power cut may leave
ledger     writes with two halves, and the audit that finds a lost or a halved one
rounds     one scenario killed at every step, with every state of the index
"""
