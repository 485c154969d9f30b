"""Everything that touches disk, devices or a terminal. Imports the libraries; no library imports it."""
