"""The process it runs in: forks, clocks, progress bars, failures beside decoding, where requests are reported."""
