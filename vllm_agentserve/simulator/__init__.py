"""One engine as a discrete-event simulation around the policy objects, and its validation against a real engine."""
