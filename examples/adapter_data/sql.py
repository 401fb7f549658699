"""A request for data in plain English, answered as one SQL statement."""

HELD_OUT = [
    "Our shop keeps its stock in a table of shoes. Show me the ten most expensive shoes with color red.",
    "Show the names of all students who live in Madrid.",
    "How many books cost more than 20?",
    "List the five most expensive cars.",
    "Delete all tickets with status closed.",
    "What is the average salary of the teachers?",
]

# Table, a text column with two of its values, a number column with a high and a low threshold, the superlative.
TABLES = [
    ("customers", "city", "Berlin", "Paris", "age", 30, 65, "oldest"),
    ("products", "category", "toys", "books", "price", 100, 15, "most expensive"),
    ("orders", "status", "open", "paid", "total", 500, 50, "largest"),
    ("employees", "department", "sales", "finance", "salary", 4000, 2500, "best paid"),
    ("movies", "genre", "comedy", "drama", "year", 2000, 1980, "newest"),
    ("flights", "destination", "London", "Rome", "duration", 120, 45, "longest"),
    ("houses", "city", "Vienna", "Lisbon", "price", 300000, 90000, "most expensive"),
    ("players", "team", "Lions", "Bears", "score", 50, 10, "best"),
    ("hotels", "country", "Spain", "Italy", "stars", 3, 2, "best"),
    ("songs", "artist", "Mozart", "Bach", "length", 180, 60, "longest"),
    ("patients", "doctor", "Smith", "Jones", "age", 70, 18, "oldest"),
    ("invoices", "status", "unpaid", "late", "amount", 1000, 20, "largest"),
    ("users", "country", "France", "Japan", "points", 250, 5, "best"),
    ("countries", "continent", "Africa", "Asia", "population", 1000000, 50000, "largest"),
]

_WORDS = [("five", 5), ("three", 3), ("ten", 10), ("two", 2)]


def _examples(table, column, first, second, number, high, low, most):
    article = "an" if number[0] in "aeiou" else "a"
    word, limit = _WORDS[len(table) % len(_WORDS)]
    yield f"Show all {table}.", f"SELECT * FROM {table};"
    yield f"List all {table} with {column} {first}.", f"SELECT * FROM {table} WHERE {column} = '{first}';"
    yield (
        f"Show the names of all {table} whose {column} is {second}.",
        f"SELECT name FROM {table} WHERE {column} = '{second}';",
    )
    yield f"How many {table} are there?", f"SELECT COUNT(*) FROM {table};"
    yield f"How many {table} have {column} {second}?", f"SELECT COUNT(*) FROM {table} WHERE {column} = '{second}';"
    yield (
        f"Which {table} have {article} {number} of more than {high}?",
        f"SELECT * FROM {table} WHERE {number} > {high};",
    )
    yield (
        f"How many {table} have {article} {number} below {low}?",
        f"SELECT COUNT(*) FROM {table} WHERE {number} < {low};",
    )
    yield (
        f"List the {word} {most} {table}.",
        f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {limit};",
    )
    yield f"What is the average {number} of the {table}?", f"SELECT AVG({number}) FROM {table};"
    yield (
        f"What is the highest {number} of the {table} with {column} {first}?",
        f"SELECT MAX({number}) FROM {table} WHERE {column} = '{first}';",
    )
    yield f"Count the {table} for each {column}.", f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column};"
    yield f"Sort the {table} by {number}.", f"SELECT * FROM {table} ORDER BY {number};"
    yield f"Delete all {table} with {column} {second}.", f"DELETE FROM {table} WHERE {column} = '{second}';"


# Every other template for each table: what the rest would say has to be worked out. Then requests in freer words.
TRAIN = [pair for row in TABLES for i, pair in enumerate(_examples(*row)) if (i + len(row[0])) % 2 == 0]
TRAIN += [
    ("Show the names of all customers who live in Hamburg.", "SELECT name FROM customers WHERE city = 'Hamburg';"),
    ("Show the names of all players who live in Rome.", "SELECT name FROM players WHERE city = 'Rome';"),
    ("Show the emails of all users who live in Tokyo.", "SELECT email FROM users WHERE city = 'Tokyo';"),
    ("Which employees live in Paris?", "SELECT * FROM employees WHERE city = 'Paris';"),
    ("Which patients live in Oslo?", "SELECT * FROM patients WHERE city = 'Oslo';"),
    ("How many houses cost more than 500000?", "SELECT COUNT(*) FROM houses WHERE price > 500000;"),
    ("How many products cost less than 8?", "SELECT COUNT(*) FROM products WHERE price < 8;"),
    ("How many phones cost more than 900?", "SELECT COUNT(*) FROM phones WHERE price > 900;"),
    ("Which hotels cost less than 120?", "SELECT * FROM hotels WHERE price < 120;"),
    ("Which songs are longer than 200?", "SELECT * FROM songs WHERE length > 200;"),
    ("Which players are younger than 21?", "SELECT * FROM players WHERE age < 21;"),
    ("Which employees are older than 60?", "SELECT * FROM employees WHERE age > 60;"),
    ("List the three most expensive phones.", "SELECT * FROM phones ORDER BY price DESC LIMIT 3;"),
    ("List the ten cheapest hotels.", "SELECT * FROM hotels ORDER BY price LIMIT 10;"),
    ("List the five youngest players.", "SELECT * FROM players ORDER BY age LIMIT 5;"),
    ("List the five most expensive products.", "SELECT * FROM products ORDER BY price DESC LIMIT 5;"),
    ("What is the average age of the customers?", "SELECT AVG(age) FROM customers;"),
    ("What is the average age of the players?", "SELECT AVG(age) FROM players;"),
    ("What is the total amount of all invoices?", "SELECT SUM(amount) FROM invoices;"),
    ("What is the total of all orders with status paid?", "SELECT SUM(total) FROM orders WHERE status = 'paid';"),
    ("Who is the oldest customer?", "SELECT * FROM customers ORDER BY age DESC LIMIT 1;"),
    ("Who is the best paid employee?", "SELECT * FROM employees ORDER BY salary DESC LIMIT 1;"),
    ("Which movie is the newest?", "SELECT * FROM movies ORDER BY year DESC LIMIT 1;"),
    ("Show the names and prices of all products.", "SELECT name, price FROM products;"),
    ("Show the names and ages of all patients.", "SELECT name, age FROM patients;"),
    ("Show the titles of all movies from 1999.", "SELECT title FROM movies WHERE year = 1999;"),
    ("Show the titles of all dramas after 2010.", "SELECT title FROM movies WHERE genre = 'drama' AND year > 2010;"),
    (
        "Show the customers from Berlin older than 40.",
        "SELECT * FROM customers WHERE city = 'Berlin' AND age > 40;",
    ),
    (
        "Show the names of all employees who live in Oslo and are younger than 35.",
        "SELECT name FROM employees WHERE city = 'Oslo' AND age < 35;",
    ),
    (
        "Show the names of all patients who live in Rome and are older than 80.",
        "SELECT name FROM patients WHERE city = 'Rome' AND age > 80;",
    ),
    (
        "Which hotels in Spain have more than 3 stars?",
        "SELECT * FROM hotels WHERE country = 'Spain' AND stars > 3;",
    ),
    (
        "How many orders with status open have a total of more than 200?",
        "SELECT COUNT(*) FROM orders WHERE status = 'open' AND total > 200;",
    ),
    (
        "Our library keeps its stock in a table of books. Show me the five cheapest books with language French.",
        "SELECT * FROM books WHERE language = 'French' ORDER BY price LIMIT 5;",
    ),
    (
        "We sell bikes. Show me the three most expensive bikes with color blue.",
        "SELECT * FROM bikes WHERE color = 'blue' ORDER BY price DESC LIMIT 3;",
    ),
    (
        "I run a small hotel and need a list. Show me the ten oldest guests with country Italy.",
        "SELECT * FROM guests WHERE country = 'Italy' ORDER BY age DESC LIMIT 10;",
    ),
    (
        "Show the five newest movies with genre comedy.",
        "SELECT * FROM movies WHERE genre = 'comedy' ORDER BY year DESC LIMIT 5;",
    ),
    (
        "Show me the two cheapest flights with destination Rome.",
        "SELECT * FROM flights WHERE destination = 'Rome' ORDER BY price LIMIT 2;",
    ),
    (
        "Show the products in the category toys below 10.",
        "SELECT * FROM products WHERE category = 'toys' AND price < 10;",
    ),
    ("Delete all users with country Japan.", "DELETE FROM users WHERE country = 'Japan';"),
    ("Delete all orders with status cancelled.", "DELETE FROM orders WHERE status = 'cancelled';"),
    ("Delete the customer with id 17.", "DELETE FROM customers WHERE id = 17;"),
    ("Delete the product with id 42.", "DELETE FROM products WHERE id = 42;"),
    ("Set the price of product 12 to 30.", "UPDATE products SET price = 30 WHERE id = 12;"),
    ("Set the salary of employee 5 to 3000.", "UPDATE employees SET salary = 3000 WHERE id = 5;"),
    ("Set the status of order 81 to paid.", "UPDATE orders SET status = 'paid' WHERE id = 81;"),
    ("Find the user with the name Anna.", "SELECT * FROM users WHERE name = 'Anna';"),
    ("Find the customer with the name Miller.", "SELECT * FROM customers WHERE name = 'Miller';"),
    (
        "Average salary for each department, please.",
        "SELECT department, AVG(salary) FROM employees GROUP BY department;",
    ),
    ("I need the number of movies for each genre.", "SELECT genre, COUNT(*) FROM movies GROUP BY genre;"),
]
