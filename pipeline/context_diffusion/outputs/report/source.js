// The rows of the page: from its own data, or from the server that sent it. Both answer the same query:
// {text, status, code, score, low, high, sort, order, offset, limit} -> {total, rows}.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 60;

function scoreOf(row, name) {
  const value = row.scores[name];
  return value === undefined ? null : value;
}

function valueOf(row, sort) {
  return sort in row ? row[sort] : scoreOf(row, sort);
}

// The lowest bin includes values below 0, the highest includes values above 1.
function within(value, low, high) {
  return value !== null && (low <= 0 || value >= low) && (high >= 1 || value < high);
}

function matches(row, query) {
  const searched = [row.id, row.prompt, row.error_message].join("\n").toLowerCase();
  return (!query.text || searched.includes(query.text.toLowerCase()))
    && (!query.status || row.status === query.status)
    && (!query.code || row.error_code === query.code)
    && (!query.score || within(scoreOf(row, query.score), query.low, query.high));
}

function sorted(rows, sort, order) {
  const failedFirst = (first, second) => (second.status === "failed") - (first.status === "failed");
  if (!sort) return rows.slice().sort(failedFirst);
  const sign = order === "desc" ? -1 : 1;
  return rows.slice().sort((first, second) => {
    const a = valueOf(first, sort);
    const b = valueOf(second, sort);
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (a < b ? -1 : a > b ? 1 : 0);
  });
}

const embeddedRows = {
  async find(query) {
    const rows = sorted(data.rows.filter(row => matches(row, query)), query.sort, query.order);
    return { total: rows.length, rows: rows.slice(query.offset, query.offset + query.limit) };
  },
  async row(id, index) {
    return data.rows.find(row => row.id === id && (row.index ?? 0) === index) || null;
  },
  thumbnailUrl: number => number === null ? null : data.thumbnails[number],
};

async function request(path, query) {
  const response = await fetch(path + "?" + new URLSearchParams(query));
  if (!response.ok) throw new Error((await response.text()).slice(0, 300));
  return response.json();
}

const servedRows = {
  find: query => request("rows", query),
  row: async (id, index) => (await request("row", { id, index })).row,
  thumbnailUrl: url => url,
};

const source = data.served ? servedRows : embeddedRows;
