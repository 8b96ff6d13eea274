"""Tables, figures, pictures and the page, from records and scores alone."""

NETWORKS = {  # what is about networks, not about runs
    "fig2": "Fig. 2: structures, drawn from the networks themselves",
    "table1": "Table 1: strategies of ResNet, VDSR, DRCN and DRRN",
    "networks": "Every network: weights, operations, time, memory, scores",
}
