"""What position became: similarity, measures, probes, figures and the explorer."""
