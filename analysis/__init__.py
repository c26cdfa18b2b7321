"""From records to tables, figures, landscapes and a report. Knows nothing of how trials ran."""
