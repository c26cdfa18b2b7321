"""From records to tables, figures and loss landscapes. Knows nothing of how they were made."""
