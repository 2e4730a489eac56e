"""What a platform keeps while all around it fails: many stock clients, a seeded schedule of faults, known answers."""
