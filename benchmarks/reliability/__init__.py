"""Whether the package holds under fire: hostile files, kills, full disks, many processes.

Each module asks one thing and answers in figures; `python -m benchmarks.reliability` runs them and
writes benchmarks/results/reliability.md. The tests run the same code in small.
"""
