"""Turn records of trials into tables, figures, landscapes and a report.

This package does not depend on how the trials were run.
"""
