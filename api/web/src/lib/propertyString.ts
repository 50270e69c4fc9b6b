// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// `key=value,key2=value2`, the form of a config value with several parts. One key may be given as a bare value.

export type Properties = Record<string, string>;

/** Splits a property string; a bare part is the value of `bareKey`. */
export function parse(text: string, bareKey?: string): Properties {
  const properties: Properties = {};
  for (const part of text.split(',')) {
    if (part === '') continue;
    const at = part.indexOf('=');
    if (at > 0) properties[part.slice(0, at)] = part.slice(at + 1);
    else if (bareKey) properties[bareKey] = part;
  }
  return properties;
}

/** Joins properties; the one named `bareKey` comes first and without its key. Empty values are left out. */
export function print(properties: Properties, bareKey?: string): string {
  const rest = Object.entries(properties).filter(([key, value]) => key !== bareKey && value !== '');
  const parts = rest.map(([key, value]) => `${key}=${value}`);
  const bare = bareKey ? properties[bareKey] : undefined;
  return (bare ? [bare, ...parts] : parts).join(',');
}
