// As app.py, for Node's own server. Writes a line for each answer, method, path, status,
// and one for each request that it lets wait.
//
// .../wait/FIRST/REST answers with 10 bytes: after FIRST ms with the head and 5 of them, REST ms later
// with the others; or cuts the connection there, if REST is `cut`.
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";

const [port, site] = process.argv.slice(2);

function answer(request, response) {
  const path = site + request.url;
  const found = statSync(path, { throwIfNoEntry: false });
  response.on("finish", () => console.log(request.method, request.url, response.statusCode));
  const [kind, ...times] = request.url.split("/").slice(-3);
  if (kind === "wait") {
    console.log("waits", request.url);
    wait(request, response, times);
  } else if (request.method === "POST") {
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

function wait(request, response, [first, rest]) {
  setTimeout(() => {
    response.writeHead(200, { "Content-Length": 10 });
    response.write("12345");
    setTimeout(() => {
      if (rest === "cut") request.socket.destroy();
      else response.end("67890");
    }, Number(rest) || 50);
  }, Number(first));
}

createServer(answer).listen(Number(port), "127.0.0.1");
