"""`hlaunch bench`: load on an OpenAI-compatible server, figures, report and plot."""
