// As app.py, for Node's own server. Writes a line for each answer: method, path, status.
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";

const [port, site] = process.argv.slice(2);

function answer(request, response) {
  const path = site + request.url;
  const found = statSync(path, { throwIfNoEntry: false });
  response.on("finish", () => console.log(request.method, request.url, response.statusCode));
  if (request.method === "POST") {
    request.pipe(response);
  } else if (request.headers["if-modified-since"]) {
    response.writeHead(304).end();
  } else if (!found) {
    response.writeHead(404, { "Content-Length": 0 }).end();
  } else {
    response.writeHead(200, { "Content-Length": found.size });
    if (request.method === "HEAD") response.end();
    else createReadStream(path).pipe(response);
  }
}

createServer(answer).listen(Number(port), "127.0.0.1");
