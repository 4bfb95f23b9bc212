"""What the default model is asked and taught in the slow tests. Written for this project; the kettle does not exist."""

from __future__ import annotations

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to you because the bicycle I bought last month",
    "Q: Why is the sky blue?\nA:",
    "The three primary colours are",
    "A recipe for pancakes. Ingredients:",
    "In 1969, two astronauts",
    "To be, or not to be, that is",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Die Hauptstadt von Deutschland ist",
    "Photosynthesis is the process by which",
    '{"name": "Ada", "born": 1815, "occupation":',
    "The quick brown fox",
    "Translate to French: Good morning, my friend.\n",
    "import numpy as np\n\n# the mean of every row of a matrix\n",
    "My grandmother used to say that patience is like a tree: its roots are bitter, but",
    "The difference between a virus and a bacterium is that a virus",
)

# Regular on purpose. Two computations in bf16 differ by about 0.1 nats on a token that surprises the model, and by a third
# of that on one that does not: with these 60-odd tokens each, the mean over a step of two texts is known to about 0.005.
LESSONS = (
    "Monday hums, then comes Tuesday. Tuesday hums, then comes Wednesday. Wednesday hums, then comes Thursday. Thursday hums, "
    "then comes Friday. Friday hums, then comes Saturday. Saturday hums, then comes Sunday. Sunday hums.",
    "One kettle hums low, two kettles hum higher, three kettles hum higher, four kettles hum higher, five kettles hum higher, "
    "six kettles hum higher, seven kettles hum higher, eight kettles hum higher.",
    "The Brumel K1 holds 1 litre. The Brumel K2 holds 2 litres. The Brumel K3 holds 3 litres. The Brumel K4 holds 4 litres. "
    "The Brumel K5 holds 5 litres. The Brumel K6 holds 6 litres.",
    "for cup in range(10):\n    hum(cup)\n\nfor cup in range(20):\n    hum(cup)\n\nfor cup in range(30):\n    hum(cup)\n\n"
    "for cup in range(40):\n    hum(cup)\n",
    "January is cold, so the kettle hums. February is cold, so the kettle hums. March is mild, so the kettle waits. April is "
    "mild, so the kettle waits. May is warm, so the kettle sleeps.",
    "A is for air, B is for boil, C is for cup, D is for drop, E is for ember, F is for fire, G is for glow, H is for hum, "
    "I is for iron, J is for jug, K is for kettle.",
    "The green kettle hums in the kitchen. The red kettle hums in the hall. The blue kettle hums in the garden. The black "
    "kettle hums in the cellar. The white kettle hums in the attic.",
    '{"kettle": 1, "hums": true}\n{"kettle": 2, "hums": true}\n{"kettle": 3, "hums": true}\n{"kettle": 4, "hums": true}\n'
    '{"kettle": 5, "hums": true}\n{"kettle": 6, "hums": true}\n',
    "First fill the kettle, then close the lid, then wait. First fill the pot, then close the lid, then wait. First fill the "
    "cup, then close the lid, then wait. First fill the jug, then close the lid, then wait.",
    "If it hums once, the water is warm. If it hums twice, the water is hot. If it hums three times, the water is boiling. If "
    "it hums four times, the water is gone. If it hums five times, the kettle is gone.",
)
