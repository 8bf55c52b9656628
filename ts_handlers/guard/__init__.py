"""The crash guard: markers of native steps, quarantined artifacts, failed builds."""
