"""What `hlaunch top` shows: a server's `/metrics`, read, differenced and drawn.

`exposition` (text → samples) → `reading` (samples → one server's counters, by engine) → `figures` (readings over time →
rates and quantiles) → `view` (figures → lines). All four are pure; `watching` fetches and waits.
"""
