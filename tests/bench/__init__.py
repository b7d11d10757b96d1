"""Benchmark: CPU of a login, compared within one run and turn about.

    service    the processes: the measured servers on one core, stores and load on the others
    driver     the load generator, with software authenticators
    rounds     a fixed number of rounds; one turn of each case a round
    report     medians, spread, ratios of pairs, text
    machine    readings of the kernel
    endurance  memory over 100,000 logins
    scale      a large database beside a small one; `seed` makes its rows
    peer       the same two-request login on Node

Neighbours on the machine change what a login costs by a tenth or more within a minute. So the
headline is a ratio of two servers that run side by side: to the Node peer, or to another checkout.
"""
