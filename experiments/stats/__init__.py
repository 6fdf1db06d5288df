"""Statistics of experiments: pure functions, numbers in, frozen named results out.

moments      sufficient statistics, estimates         effects      differences, lifts, non-inferiority
cuped        variance reduction                       sequential   confidence sequences, group-sequential boundaries
bayes        probability to be best, expected loss    power        sample size, minimum detectable effect
resampling   bootstrap by unit, quantiles             checks       sample ratio, A/A, many tests, interactions
"""
