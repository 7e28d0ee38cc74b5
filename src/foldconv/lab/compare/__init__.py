"""Which method is better, by how much, and how sure is that: several methods trained with the same seeds.

`config.CompareConfig` says what, `runner.compare` trains what is missing and reports, `reporting.report` only reports.
Runs are `processes` of this machine, or tasks of a Ray `cluster`, there behind `tether.py`.
Runs of one seed share the initial weights (where shapes allow) and the order of the images, so their difference is a
paired one.
"""
