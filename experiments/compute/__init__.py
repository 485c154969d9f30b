"""Test-time compute: what a trained run spends on its predictions under other solver settings, and what it gets."""
