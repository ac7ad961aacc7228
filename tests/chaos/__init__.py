"""Training runs under a seeded schedule of faults: kills, freezes, full disks, bad reads, damaged files, wrong clocks."""
