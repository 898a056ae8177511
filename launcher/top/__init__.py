"""What `hlaunch top` shows: a server's `/metrics`, read, differenced and drawn.

`exposition` (text → samples) → `reading` (samples → one server's counters, by engine) → `figures` (readings over time →
rates and quantiles) → `view` (figures → lines); `ranks` and `rank_view` are the last three for single ranks. All are
pure; `watching` fetches and waits.
"""
