"""What people look at or take away: plots, the report, Figure 2, attention, maps, exported models."""
