"""What a login costs: `make bench`, with a Node peer `make bench-peers`, beside a large database
`make bench-scale`.

    measure    CPU and memory of processes from the kernel, the machine, the calibration
    driver     a process of its own: software authenticators that run whole logins, so many in
               flight
    service    the servers under measurement, each pinned: the broker on one core, stores and driver
               on another
    cases      what is run, in turns, and which repetitions count
    report     medians, the ratio to one signature check, tables, comparison of two runs
    endurance  memory over 100,000 logins
    scale      a large database beside a small one; seed makes its rows
    peer       the same two-request login on Node, fastify and @simplewebauthn/server

A figure is CPU per login divided by the CPU of one P-256 verification, which the same core did
right before and right after: machines differ, and so do the minutes of one machine; the ratio
hardly. A repetition in which other processes took more than 15 % of a core, or the core changed its
speed by more than 10 %, is discarded; a run with one failed login reports nothing. All traffic
stays on loopback.
"""
