"""`make bench`: each case as a ratio to a yardstick that was measured in the same run.

    python -m bench [--quick] [CASE ...]

README.md says what the figures mean. Nothing here is part of the daemon, or asserts anything.
"""
